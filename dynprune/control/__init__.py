"""Which level fits the budget on this machine at this moment: plain numbers, no torch, every clock and every file passed in."""
