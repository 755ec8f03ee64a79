from bench.selection.command import main

raise SystemExit(main())
