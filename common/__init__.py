"""What every room uses: files and locks, processes, the console, the machine."""
