"""The head put into models of other libraries."""
