"""Speed and memory: ratios against others in one process, shares of what the machine can do, growth. Reports only; nothing an edit needs."""
