"""torchrun that kills processes two seconds after it has asked them to end, as ``--shutdown-timeout=2`` does.

That option is not used where a process has failed, for which PyTorch waits 30 seconds.
"""

from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.run import main

PContext.close.__defaults__ = (None, 2)

if __name__ == "__main__":
    main()
