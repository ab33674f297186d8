"""What is learnt: corruption, targets and token losses of each family."""
