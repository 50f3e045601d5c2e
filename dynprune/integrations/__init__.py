"""One module per friend; each imports its friend, and nothing in dynprune imports them."""
