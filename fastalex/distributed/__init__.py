"""Several processes that train one network: what they tell each other, and how they divide the work."""
