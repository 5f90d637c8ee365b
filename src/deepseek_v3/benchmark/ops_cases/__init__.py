"""The operations that `dsv3 bench ops` measures, each with the sizes of training and a reference."""
