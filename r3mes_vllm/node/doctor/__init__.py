"""What is wrong with this node's surroundings, and how to mend it."""
