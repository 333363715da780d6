defmodule VLLM.Engine.OrphanTest do
  # Nothing of an engine outlives what it depends on: the real engine with all
  # its processes, whatever is killed, and whenever.
  use ExUnit.Case

  import VLLM.OSProcess

  alias VLLM.{DemoModel, FakeEngine}

  @moduletag timeout: 300_000

  # What the promise says; a process that is to die is waited for, not slept for.
  @soon 5_000

  setup do
    %{shared_memory: shared_memory(), run_folders: run_folders()}
  end

  describe "the BEAM killed" do
    # This is the worst of its kind: the worker cannot react, and its children
    # are in sessions of their own.
    test "while serving, with the worker stopped by SIGSTOP", context do
      beam = start_beam()
      tree = await(beam, :serving)
      assert signal("STOP", victim(:worker, tree))
      kill_and_check(beam.os_pid, tree, context)
    end

    for moment <- [:loading, :idle, :serving] do
      @tag :slow
      test "while #{moment}", context do
        beam = start_beam()
        tree = await(beam, unquote(moment))
        kill_and_check(beam.os_pid, tree, context)
      end
    end
  end

  for victim <- [:guard, :worker], moment <- [:loading, :idle, :serving] do
    @tag :slow
    test "the #{victim} killed while #{moment}", context do
      # It is not to come back: what is left is looked for.
      llm = start(max_restarts: 0)
      assert eventually(fn -> victim(unquote(victim), tree(llm)) != nil end)
      unless unquote(moment) == :loading, do: assert(:ok = VLLM.await_ready(llm))
      if unquote(moment) == :serving, do: serve(llm)
      tree = tree(llm)
      kill_and_check(victim(unquote(victim), tree), tree, context)
      assert eventually(fn -> match?({:error, %{reason: :failed}}, VLLM.await_ready(llm)) end)
      VLLM.stop(llm)
    end
  end

  defp start(options) do
    {:ok, config} =
      DemoModel.options()
      |> Keyword.merge(options)
      |> Keyword.put(:model, DemoModel.path())
      |> VLLM.Engine.Config.new()

    {:ok, pid} = VLLM.Engine.start(config)
    pid
  end

  defp serve(llm) do
    test = self()

    spawn(fn ->
      send(test, :sent)
      VLLM.generate(llm, "Count:", max_tokens: 900, ignore_eos: true)
    end)

    assert_receive :sent
    assert eventually(fn -> FakeEngine.in_flight(llm) == 1 end)
  end

  # The guard and everything below it.
  defp tree(llm) do
    case FakeEngine.workers(llm) do
      [{_worker, %{os_pid: guard}}] -> [guard | descendants(guard)]
      [{_worker, nil}] -> []
    end
  end

  defp victim(_, []), do: nil
  defp victim(:guard, [guard | _]), do: guard
  defp victim(:worker, [guard | _]), do: FakeEngine.worker_pid(%{os_pid: guard})

  # A second BEAM, which starts an engine and tells how far it is.
  defp start_beam do
    code = """
    options = #{inspect(Keyword.put(DemoModel.options(), :name, Orphan))}
    {:ok, config} = VLLM.Engine.Config.new(Keyword.put(options, :model, #{inspect(DemoModel.path())}))
    {:ok, _} = VLLM.Engine.start(config)
    IO.puts("loading")
    :ok = VLLM.await_ready(Orphan)
    IO.puts("idle")
    spawn(fn -> VLLM.generate(Orphan, "Count:", max_tokens: 900, ignore_eos: true) end)
    {:ok, table, _} = VLLM.Engine.Table.lookup(Orphan)
    [worker] = VLLM.Engine.Table.workers(table)
    Stream.repeatedly(fn -> VLLM.Bridge.Connection.in_flight(worker.conn) end) |> Enum.find(& &1 == 1)
    IO.puts("serving")
    Process.sleep(:infinity)
    """

    paths = Enum.flat_map(:code.get_path(), &["-pa", to_string(&1)])

    port =
      Port.open({:spawn_executable, System.find_executable("elixir")}, [
        :binary,
        :stderr_to_stdout,
        {:line, 10_000},
        args:
          paths ++
            [
              "-e",
              "Logger.configure(level: :error); {:ok, _} = Application.ensure_all_started(:ex_vllm);" <>
                code
            ]
      ])

    {:os_pid, os_pid} = Port.info(port, :os_pid)
    %{port: port, os_pid: os_pid}
  end

  # The guard of the second BEAM and everything below it, once it has said that
  # it is so far.
  defp await(%{port: port} = beam, moment) do
    line = Atom.to_string(moment)
    assert_receive {^port, {:data, {:eol, ^line}}}, 120_000
    assert eventually(fn -> victim(:worker, engine_tree(beam.os_pid)) != nil end)
    engine_tree(beam.os_pid)
  end

  defp engine_tree(beam) do
    case Enum.filter(descendants(beam), &(command(&1) =~ "guard.py")) do
      [guard | _] -> [guard | descendants(guard)]
      [] -> []
    end
  end

  defp kill_and_check(victim, tree, context) do
    assert signal("KILL", victim)
    assert eventually(fn -> not Enum.any?(tree, &alive?/1) end, @soon)
    assert eventually(fn -> shared_memory() -- context.shared_memory == [] end, @soon)
    assert eventually(fn -> run_folders() -- context.run_folders == [] end, @soon)
  end

  defp shared_memory, do: File.ls!("/dev/shm")

  defp run_folders do
    case File.ls(VLLM.Bridge.Program.base_dir()) do
      {:ok, folders} -> folders
      {:error, _} -> []
    end
  end
end
