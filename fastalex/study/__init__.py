"""The study's table: its rows, their finished runs, and what is written about them."""
