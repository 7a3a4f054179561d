"""The dashboard and the rules, and the scripts that write and draw the dashboard."""
