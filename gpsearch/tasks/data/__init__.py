"""AN4 as features, with its notice; made by scripts/make_an4.py."""
