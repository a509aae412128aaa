from r3mes_vllm.cli.main import main

main()
