"""Studies: one question each, answered by a figure, a table and a paragraph made from the numbers."""
