"""The crash suite: a model, crash points, a nemesis, and planted bugs that each must turn it red. See README.md."""
