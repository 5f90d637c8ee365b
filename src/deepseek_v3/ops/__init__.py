"""One folder per operation. `reference.py` is its definition in plain torch, for any float type and device."""
