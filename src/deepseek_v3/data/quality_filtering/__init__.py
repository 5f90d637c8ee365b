"""Models of quality: fastText classifiers and n-gram language models, trained, stored and applied."""
