"""From a folder of raw videos to a training set: stages, their journal, the engine that runs them, selection."""
