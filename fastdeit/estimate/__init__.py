"""What a run will take: the model behind `fastdeit plan`."""
