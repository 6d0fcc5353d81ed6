"""Training some layers of a student: what decides a run, its losses, and the one loop."""
