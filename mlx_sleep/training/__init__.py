"""Training through sleep: recipes, and the trainer that runs one. Nothing here knows a task."""
