"""What people see of a search: files, pictures, tables, and the comparison of methods. One kind of output a file."""
