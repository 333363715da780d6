defmodule VLLM.SecretsTest do
  # What must not be told is told nowhere, whatever crashes.
  use ExUnit.Case
  doctest VLLM.Secrets

  import ExUnit.CaptureLog
  import VLLM.FakeEngine
  import VLLM.OSProcess

  alias VLLM.Engine.{Config, Replicas, Table}

  @token "hf_TokenThatMustNotBeTold"
  @value "ValueThatMustNotBeTold"
  @second "SecondValueThatMustNotBeTold"
  @secrets [@token, @value, @second]

  @options [
    hf_token: @token,
    env: [%{"VLLM_TEST_SECRET" => @value}, %{"VLLM_TEST_SECRET" => @second}],
    replicas: 2
  ]

  # Takes everything that is logged, also what Elixir's Logger leaves out: the
  # reports of supervisors and of processes.
  def log(event, %{config: %{pid: pid}}) do
    text = :logger_formatter.format(event, %{})
    send(pid, {:logged, IO.chardata_to_string(text) <> inspect(event, limit: :infinity)})
  end

  defp capture(function) do
    test = self()
    :ok = :logger.add_handler(:secrets, __MODULE__, %{config: %{pid: test}, level: :all})

    try do
      # And not on the terminal.
      capture_log(function)
    after
      :logger.remove_handler(:secrets)
    end

    logged("")
  end

  defp logged(text) do
    receive do
      {:logged, more} -> logged(text <> more <> "\n")
    after
      0 -> text
    end
  end

  defp assert_untold(text) when is_binary(text) do
    for secret <- @secrets, do: refute(text =~ secret, "tells #{secret}: #{text}")
  end

  defp assert_untold(term) do
    assert_untold(inspect(term, limit: :infinity, printable_limit: :infinity, structs: false))
    assert_untold(inspect(term, limit: :infinity, printable_limit: :infinity))
    assert_untold(to_string(:io_lib.format("~p", [term])))
  end

  test "processes, supervisors and the engine's table tell no secret" do
    llm = start!("ready", @options)
    {:ok, table, engine} = Table.lookup(llm)
    {:ok, control} = Table.control(table)

    for pid <- [engine, control, Table.workers_supervisor(table), Table.process(table, 1)] do
      assert_untold(:sys.get_status(pid))
      assert_untold(:sys.get_state(pid))
    end

    assert_untold(:ets.tab2list(table))
    assert_untold(llm)
    assert_untold(VLLM.replicas!(llm))
    assert_untold(Supervisor.which_children(engine))
    {:ok, config} = Config.new([model: "ready"] ++ @options)
    assert_untold(config)
    assert_untold(VLLM.child_spec([name: Told, model: "ready"] ++ @options))
    # And yet the worker has it.
    assert {:ok, text} = ask(llm, "env:VLLM_TEST_SECRET")
    assert text in [@value, @second]
  end

  test "crashes of any process of ours tell none" do
    log =
      capture(fn ->
        llm = start!("ready", [max_restarts: 1] ++ @options)
        {:ok, table, _engine} = Table.lookup(llm)
        worker = Table.process(table, 1)
        monitor = Process.monitor(worker)

        # A fault of our own in the worker, and in the control process.
        :sys.replace_state(worker, fn {state, data} -> {state, %{data | run: :broken}} end)
        send(worker, {{:caller_down, 1}, make_ref(), :process, self(), :killed})
        assert_receive {:DOWN, ^monitor, _, _, _}, 30_000
        # The supervisor reports before it starts another.
        assert eventually(fn -> Table.process(table, 1) != worker end)
        {:ok, control} = Table.control(table)
        monitor = Process.monitor(control)
        :sys.replace_state(control, fn state -> %{state | waiting: :broken} end)
        send(control, :status)
        assert_receive {:DOWN, ^monitor, _, _, _}, 30_000
        assert :ok = VLLM.await_ready(llm)

        # An operation, and a caller, which has the config at hand.
        assert {:error, error} =
                 VLLM.Engine.Control.operate(table, fn ->
                   Config.env(Table.config(table), :not_a_number)
                 end)

        assert error.reason == :internal
        assert_untold(error)

        # A task, which tells of its crash before it ends.
        {:ok, caller} =
          Task.start(fn ->
            options = @options
            {:error, error} = ask(llm, "kill")
            raise "after #{error.message} with #{length(options)}"
          end)

        monitor = Process.monitor(caller)
        assert_receive {:DOWN, ^monitor, _, _, _}, 30_000

        # Killed without a word, until the supervisors report and give up.
        for _ <- 1..3,
            index <- 1..2,
            pid = Table.process(table, index),
            do: Process.exit(pid, :kill)
      end)

    # They did crash, and it was told.
    for words <- [
          "CRASH REPORT",
          "SUPERVISOR REPORT",
          "State machine",
          "GenServer",
          "RuntimeError"
        ],
        do: assert(log =~ words, words)

    assert_untold(log)
  end

  test "errors tell none, not even where the options are wrong" do
    for options <- [
          [env: [%{"A" => @value <> "\0"}]],
          [env: [%{"A" => {@value}}]],
          [env: %{"A=#{@second}" => "x"}],
          [hf_token: @token, replicas: 0],
          [hf_token: @token, python: "/nowhere"]
        ] do
      log =
        capture(fn ->
          {:error, error} = VLLM.llm("ready", options)
          assert_untold(error)
          assert_untold(Exception.message(error))
        end)

      assert_untold(log)
    end

    llm = start!("ready", @options)
    {:error, error} = ask(llm, "kill")
    assert_untold(error)
    {:error, error} = Replicas.reload(llm, [hf_token: @token, max_queue: -1], [])
    assert_untold(error)
    {:error, error} = VLLM.reload(llm, model: "refuse:out_of_memory", hf_token: @token)
    assert_untold(error)
  end

  test "a key that may be secret has none of its value told, at any depth and in any shape" do
    secret = %{"aws_secret_access_key" => @value, "nested" => [%{api_key: @second}]}

    for call <- [
          fn -> VLLM.llm("m", [{"hf_token", @token}, {"seed", 1}]) end,
          fn -> VLLM.llm(hf_token: @token, password: @value) end,
          fn -> VLLM.llm("m", replicas: [{"hf_token", @token}, {:env, %{"A" => @value}}]) end,
          fn -> VLLM.llm("m", name: %{credentials: secret}) end,
          fn -> VLLM.llm("m", hf_token: {@token}) end,
          fn -> VLLM.llm("m", model_loader_extra_config: Map.put(secret, :x, {@value})) end,
          fn -> VLLM.generate(:nobody, [hf_token: @token], []) end,
          fn -> VLLM.generate([hf_token: @token], "x") end,
          fn -> VLLM.generate(:nobody, "x", lora_request: secret) end,
          fn -> VLLM.generate(:nobody, "x", sampling_params: [{"token", @token}]) end,
          fn -> VLLM.chat(:nobody, [%{role: "user", content: "x"}, [{"token", @token}]]) end,
          fn -> VLLM.scale(:nobody, 1, timeout: secret) end,
          fn -> VLLM.score(:nobody, "x", hf_token: @token) end,
          fn -> VLLM.lora_request("sql", hf_token: @token) end
        ] do
      assert {:error, error} = call.()
      assert_untold(error)
      assert Exception.message(error) != ""
    end

    # And the engine that has them shows them to nobody.
    {:ok, config} = Config.new(model: "m", model_loader_extra_config: secret, seed: 1)
    assert config.engine_options == %{"seed" => 1}
    assert_untold(config)

    assert config.secrets.().engine_options == %{
             "model_loader_extra_config" => %{secret | "nested" => [%{"api_key" => @second}]}
           }
  end

  test "command lines of the tree tell none" do
    llm = start!("ready", @options)

    for {_, program} <- workers(llm), pid <- [program.os_pid | descendants(program.os_pid)] do
      assert_untold(command(pid))
    end
  end
end
