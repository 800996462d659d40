"""What happens to which sample: order, augmentation and mixing as plain arrays. numpy only."""
