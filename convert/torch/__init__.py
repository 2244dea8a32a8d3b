"""The architectures in PyTorch: definitions to compare with and to train in. Needs torch."""
