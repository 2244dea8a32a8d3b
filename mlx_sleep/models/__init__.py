"""Architectures, one a file, and the folders they live in. They know no chat."""
