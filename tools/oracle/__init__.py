"""What `tools/check_oracle.py` computes: each recorded output, by this package's own code."""
