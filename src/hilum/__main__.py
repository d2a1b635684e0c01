from hilum.cli import main

main()
