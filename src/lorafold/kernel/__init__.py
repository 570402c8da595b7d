"""The one function that adds a ΔW to a weight, what it is made of, and its compiled part for rows that go from file to file."""
