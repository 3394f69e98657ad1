"""A gas of particles in a trap: energy and forces by attention, and what they are compared with."""
