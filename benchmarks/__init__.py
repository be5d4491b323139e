"""Speed measurements, and the plain PyTorch program they are measured against."""
