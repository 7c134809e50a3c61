"""What a training measures of itself: time, memory, speed, what happens within the loss."""
