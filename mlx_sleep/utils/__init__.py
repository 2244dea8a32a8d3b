"""What every layer may use: errors, files, the machine. Nothing here knows a model."""
