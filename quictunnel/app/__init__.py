"""What the commands do: settings become plain values, rooms are put together, the process is started and stopped."""
