"""Controls: what every comparison needs beside a method."""
