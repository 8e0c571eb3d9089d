"""What runs left behind, as a page: charts and tables from the files of their folders."""
