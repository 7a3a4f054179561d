"""The dashboard, the rules, and the scripts that make and draw them."""
