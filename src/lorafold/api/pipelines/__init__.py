"""Merging into a diffusers pipeline: each component that an adapter changes by itself, the rest as it is, all of it or nothing.

How one component is merged, planned or proven is given as a function: that is for the rooms above. What is here divides adapters
among components and puts the outcomes together."""
