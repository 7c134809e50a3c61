"""Text that language models write: token by token, with what they have read kept between tokens."""
