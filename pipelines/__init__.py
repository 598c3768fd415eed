"""Recipes, the engine that runs them, the executors, one thin function a stage, and the command line."""
