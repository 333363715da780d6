defmodule Mix.Tasks.Vllm.ServeTest do
  # Mix's shell is the same for all processes.
  use ExUnit.Case, async: false

  import VLLM.MixShell

  alias Mix.Tasks.Vllm.Serve

  setup :capture_shell

  test "options are the server's or the engine's, and the command line counts before the environment" do
    argv =
      ~w(org/a org/b --port 81 --max-model-len 64 --tool-call-parser hermes --no-tokenize) ++
        ~w(--hosts llm.example,*.lan)

    env = %{
      "LLM_API_KEYS" => "one, two",
      "LLM_ALLOWED_MODELS" => "org/*",
      "LLM_MAX_CONCURRENT_REQUESTS" => "4",
      "LLM_ENABLE_ISQ" => "true"
    }

    assert {["org/a", "org/b"], engine, server} = Serve.options(argv, env)
    assert engine == %{"max_model_len" => 64, "isq" => "Q4_K", "allowed_models" => ["org/*"]}

    assert server == %{
             "port" => 81,
             "tool_call_parser" => "hermes",
             "tokenize" => false,
             "hosts" => ["llm.example", "*.lan"],
             "api_keys" => ["one", "two"],
             "max_concurrent_requests" => 4
           }

    env = %{
      "LLM_ENABLE_ISQ" => "1",
      "LLM_ISQ_TYPE" => "Q8_0",
      "LLM_MAX_CONCURRENT_REQUESTS" => "few"
    }

    argv = ~w(org/a --isq HQQ4)

    assert {_, %{"isq" => "HQQ4"}, %{"max_concurrent_requests" => "few"}} =
             Serve.options(argv, env)

    assert {_, %{"isq" => "Q8_0"}, _} = Serve.options(["org/a"], env)
    assert {_, engine, %{}} = Serve.options(["org/a"], %{"LLM_ENABLE_ISQ" => "false"})
    assert engine == %{}

    # Which no server is to take, and no engine knows.
    assert {["org/a"], %{"models" => "org/b"}, %{}} = Serve.options(~w(org/a --models org/b), %{})
  end

  test "serves until it is ended, and nothing of it is left then" do
    python = Path.expand("../../support/fake_python", __DIR__)
    argv = ~w(ready --port 0 --no-nursery --no-progress --python) ++ [python]
    test = self()

    {task, monitor} =
      spawn_monitor(fn ->
        Process.put(:"$callers", [test])
        Serve.run(argv)
      end)

    assert_receive {:mix_shell, :info, ["Serving ready at http://127.0.0.1:" <> rest]}, 20_000
    {port, "/v1"} = Integer.parse(rest)
    {:ok, socket} = :gen_tcp.connect({127, 0, 0, 1}, port, [:binary, active: false])
    :ok = :gen_tcp.send(socket, "GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert {:ok, "HTTP/1.1 200 OK" <> answer} = :gen_tcp.recv(socket, 0, 20_000)
    assert answer =~ ~s("id": "ready")
    Process.exit(task, :shutdown)
    assert_receive {:DOWN, ^monitor, :process, ^task, :shutdown}, 20_000
    assert {:error, :closed} = :gen_tcp.recv(socket, 0, 20_000)
  end
end
