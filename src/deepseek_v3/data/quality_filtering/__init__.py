"""Quality filtering by fastText classifiers and n-gram language models: training, model files, and the stage."""
