"""Pruning: structured (groups of channels that go together, cut out for real) and by weight."""
