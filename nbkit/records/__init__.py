"""What goes in and what comes out, without torch: requests, result rows, where they come from, and statistics."""
