"""The verb `bench`: measurements of our step, training, input and kernels, and of their peers, side by side."""
