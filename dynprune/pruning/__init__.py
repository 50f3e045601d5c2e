"""Static pruning: physically smaller modules, unstructured masks, and the static network nearest to a level."""
