defmodule VLLM.ReplicasTest do
  # Replicas that come, go and begin anew under load, by the fake worker.
  use ExUnit.Case, async: true

  import VLLM.FakeEngine
  import VLLM.OSProcess

  alias VLLM.{Error, Puppet, Replica}

  @moduletag :tmp_dir

  defp states(llm), do: for(replica <- VLLM.replicas!(llm), do: replica.state)

  # The operations wait for requests: in a process of its own, which hands on `{name, result}`.
  defp in_background(name, operation) do
    test = self()
    spawn(fn -> send(test, {name, operation.()}) end)
  end

  # Callers that ask without a pause until they are told to stop; then each says what it got.
  defp load(llm, callers) do
    test = self()

    for n <- 1..callers do
      spawn(fn ->
        Process.monitor(test)
        send(test, {:load, self(), ask_until_told(llm, "#{n}", [])})
      end)
    end
  end

  defp ask_until_told(llm, text, results) do
    result = ask(llm, "reply:#{text}")

    receive do
      :enough -> [{result, text} | results]
      {:DOWN, _, :process, _, _} -> exit(:normal)
    after
      0 -> ask_until_told(llm, text, [{result, text} | results])
    end
  end

  # Each in a session of its own: no replica goes without.
  defp occupy(llm, count, prompt) do
    for n <- 1..count, do: ask_in_background(llm, prompt, session: n)

    assert eventually(fn ->
             in_flight = for replica <- VLLM.replicas!(llm), do: replica.in_flight
             Enum.sum(in_flight) == count and Enum.all?(in_flight, &(&1 > 0))
           end)
  end

  defp assert_nothing_lost(callers) do
    for caller <- callers, do: send(caller, :enough)

    for caller <- callers do
      assert_receive {:load, ^caller, results}, 60_000
      assert results != []
      for {result, text} <- results, do: assert(result == {:ok, text})
    end
  end

  describe "replicas/1" do
    test "shows what each does" do
      llm = start!("ready", replicas: 2, devices: [[0, 1], [2, 3]])

      assert {:ok,
              [
                %Replica{index: 1, state: :ready, in_flight: 0, error: nil, devices: [0, 1]},
                %Replica{index: 2, state: :ready, in_flight: 0, error: nil, devices: [2, 3]}
              ]} = VLLM.replicas(llm)

      ask_in_background(llm, "hold")

      assert eventually(fn ->
               Enum.sort(for replica <- VLLM.replicas!(llm), do: replica.in_flight) == [0, 1]
             end)

      assert {:error, %Error{reason: :not_running}} = VLLM.replicas(Nobody)
      assert_raise Error, fn -> VLLM.replicas!(Nobody) end
    end

    test "shows why one failed" do
      start_supervised!({VLLM.FakeEngine, name: Shown, model: "refuse:out_of_memory"})
      assert {:error, _} = VLLM.await_ready(Shown)

      assert [%{state: :failed, error: %Error{reason: :out_of_memory}}] = VLLM.replicas!(Shown)
    end
  end

  describe "devices: and env:" do
    test "are each replica's own" do
      env = [%{"VLLM_TEST_OWN" => "first"}, [VLLM_TEST_OWN: "second"]]
      llm = start!("ready", devices: [[0, 1], ["GPU-1:2"]], env: env)

      seen =
        for index <- [1, 2] do
          assert :ok = VLLM.drain(llm, 3 - index)
          assert {:ok, devices} = ask(llm, "devices")
          assert {:ok, own} = ask(llm, "env:VLLM_TEST_OWN")
          assert :ok = VLLM.restart(llm)
          {devices, own}
        end

      assert seen == [{"0,1", "first"}, {"GPU-1:2", "second"}]
    end

    test "must fit the replicas" do
      for {options, option, words} <- [
            {[devices: [[0]], replicas: 2], "devices", "1 entries"},
            {[devices: [[0], [1]], replicas: 1], "devices", "2 entries"},
            {[env: [%{}], replicas: 2], "env", "1 entries"},
            {[devices: [0, 1]], "devices", "list of lists"},
            {[devices: [[]]], "devices", "list of lists"},
            {[devices: [["0,1"]]], "devices", "list of lists"},
            {[env: %{"A" => "x\0y"}], "env", "map from names"},
            {[env: %{"A=B" => "x"}], "env", "map from names"},
            {[env: [%{"A" => {}}]], "env", "map from names"}
          ] do
        assert {:error, %Error{reason: :invalid_option} = error} = start("ready", options)
        assert error.details["option"] == option
        assert error.message =~ words
      end
    end
  end

  describe "scale" do
    test "adds replicas, which share the load, and takes them away when they are done", context do
      llm = start!()
      assert :ok = VLLM.scale(llm, 3)
      assert states(llm) == [:ready, :ready, :ready]
      occupy(llm, 12, "wait:#{context.tmp_dir}/go")
      [_, {_, second}, {_, third}] = workers(llm)

      in_background(:scaled, fn -> VLLM.scale(llm, 1) end)
      assert eventually(fn -> states(llm) == [:ready, :draining, :draining] end)
      for _ <- 1..5, do: assert({:ok, "x"} = ask(llm, "reply:x"))
      assert Enum.all?(VLLM.replicas!(llm), &(&1.in_flight > 0))
      refute_received {:scaled, _}
      File.touch!(Path.join(context.tmp_dir, "go"))
      assert_receive {:scaled, :ok}, 30_000
      for _ <- 1..12, do: assert_receive({:answer, {:ok, "waited"}}, 30_000)
      assert states(llm) == [:ready]
      for program <- [second, third], do: refute(alive?(program.os_pid))
      assert {:ok, "x"} = ask(llm, "reply:x")
    end

    test "has none of the new ones when one cannot start", %{tmp_dir: dir} do
      llm = start!("if:#{dir}/full:refuse:out_of_memory;ready")
      File.touch!(Path.join(dir, "full"))
      assert {:error, %Error{reason: :out_of_memory}} = VLLM.scale(llm, 3)
      assert states(llm) == [:ready]
      File.rm!(Path.join(dir, "full"))
      assert :ok = VLLM.scale!(llm, 2)
      assert states(llm) == [:ready, :ready]
    end

    test "refuses what cannot be" do
      llm = start!("ready", devices: [[0]])
      assert {:error, %Error{reason: :invalid_option} = error} = VLLM.scale(llm, 2)
      assert error.details["option"] == "devices"
      assert {:error, %Error{reason: :invalid_option} = error} = VLLM.scale(llm, 0)
      assert error.message =~ "at least one"
      assert {:error, %Error{reason: :invalid_option}} = VLLM.scale(llm, 1, tiemout: 1)
      assert {:error, %Error{reason: :not_running}} = VLLM.scale(Nobody, 1)
      assert states(llm) == [:ready]
    end

    test "loses no request while callers go on" do
      llm = start!()
      callers = load(llm, 4)
      assert :ok = VLLM.scale(llm, 3)
      assert :ok = VLLM.scale(llm, 1)
      assert_nothing_lost(callers)
    end
  end

  describe "drain" do
    test "lets a replica finish what it has, and leaves nothing of it", %{tmp_dir: dir} do
      llm = start!("ready", replicas: 2)
      occupy(llm, 8, "wait:#{dir}/go")
      [{_, program}, _] = workers(llm)
      in_background(:drained, fn -> VLLM.drain(llm, 1) end)
      assert eventually(fn -> states(llm) == [:draining, :ready] end)
      for _ <- 1..5, do: assert({:ok, "x"} = ask(llm, "reply:x"))
      refute_received {:drained, _}
      File.touch!(Path.join(dir, "go"))
      assert_receive {:drained, :ok}, 30_000
      for _ <- 1..8, do: assert_receive({:answer, {:ok, "waited"}}, 30_000)
      assert states(llm) == [:drained, :ready]
      refute alive?(program.os_pid)
      refute File.exists?(program.run_dir)
      assert :ok = VLLM.drain(llm, 1)
      assert {:ok, "x"} = ask(llm, "reply:x")
    end

    test "ends what takes longer than its timeout" do
      llm = start!()
      ask_in_background(llm, "hold")
      await_held(llm, 1)
      assert :ok = VLLM.drain(llm, 1, timeout: 100)
      assert_receive {:answer, {:error, %Error{reason: :shutdown}}}, 30_000

      # Nobody is left, and nobody will come.
      assert {:error, %Error{reason: :not_running, message: message}} = ask(llm, "reply:x")
      assert message =~ "VLLM.restart"
      assert :ok = VLLM.restart(llm)
      assert {:ok, "x"} = ask(llm, "reply:x")
    end

    test "gives up a start" do
      start_supervised!({VLLM.FakeEngine, name: Loading, model: "hang"})
      assert eventually(fn -> match?([{_, %{os_pid: _}}], workers(Loading)) end)
      [{_, program}] = workers(Loading)
      assert :ok = VLLM.drain(Loading, 1)
      refute alive?(program.os_pid)
      assert states(Loading) == [:drained]
    end

    test "of a replica that dies meanwhile is over then", %{tmp_dir: dir} do
      llm = start!()
      ask_in_background(llm, "wait:#{dir}/go")
      assert eventually(fn -> in_flight(llm) == 1 end)
      [{_, program}] = workers(llm)
      in_background(:drained, fn -> VLLM.drain(llm, 1) end)
      assert eventually(fn -> states(llm) == [:draining] end)
      assert signal("KILL", worker_pid(program))
      assert_receive {:drained, :ok}, 30_000
      assert_receive {:answer, {:error, %Error{reason: :engine_dead}}}, 30_000
      assert states(llm) == [:drained]
    end

    test "is for replicas that there are" do
      llm = start!()

      for replica <- [0, 2, -1, "1", nil] do
        assert {:error, %Error{reason: :invalid_option} = error} = VLLM.drain(llm, replica)
        assert error.message =~ "1 to 1"
      end

      assert_raise Error, fn -> VLLM.drain!(llm, 7) end
    end
  end

  describe "restart" do
    test "brings a failed engine back" do
      llm = start!("ready", max_restarts: 0)
      assert {:error, %Error{reason: :engine_dead}} = ask(llm, "exit:1")
      assert {:error, %Error{reason: :failed, message: message}} = ask(llm, "reply:x")
      assert message =~ "VLLM.restart"
      assert :ok = VLLM.restart(llm)
      assert {:ok, "x"} = ask(llm, "reply:x")
      # It has its restarts anew.
      assert [%{state: :ready}] = VLLM.replicas!(llm)
    end

    test "says why one does not come back" do
      start_supervised!({VLLM.FakeEngine, name: Hopeless, model: "refuse:out_of_memory"})
      assert {:error, _} = VLLM.await_ready(Hopeless)
      assert {:error, %Error{reason: :out_of_memory}} = VLLM.restart(Hopeless)
      assert_raise Error, fn -> VLLM.restart!(Hopeless, 1) end
    end

    test "of replicas that serve loses no request" do
      llm = start!("ready", replicas: 2)
      callers = load(llm, 4)
      before = for {_, program} <- workers(llm), do: program.os_pid
      assert :ok = VLLM.restart(llm)
      assert_nothing_lost(callers)
      for pid <- before, do: refute(alive?(pid))
      assert states(llm) == [:ready, :ready]
    end

    test "of the only replica has callers wait" do
      llm = start!()
      callers = load(llm, 4)
      assert :ok = VLLM.restart!(llm, 1)
      assert_nothing_lost(callers)
    end
  end

  describe "reload" do
    test "gives new options to one replica after another and loses no request" do
      llm = start!("ready", replicas: 2, env: %{"VLLM_TEST_A" => "old", "VLLM_TEST_B" => "b"})
      callers = load(llm, 4)
      assert :ok = VLLM.reload(llm, env: %{"VLLM_TEST_A" => "new"})
      assert_nothing_lost(callers)

      for _ <- 1..4 do
        assert {:ok, "new"} = ask(llm, "env:VLLM_TEST_A")
        assert {:ok, ""} = ask(llm, "env:VLLM_TEST_B")
      end
    end

    test "keeps the options that are not given, and takes a new model" do
      llm = start!("ready", env: %{"VLLM_TEST_A" => "kept"}, max_in_flight: 2, max_queue: 0)
      assert :ok = VLLM.reload(llm, model: "print:hello;ready", max_queue: 1)
      assert {:ok, "kept"} = ask(llm, "env:VLLM_TEST_A")
      for _ <- 1..3, do: ask_in_background(llm, "hold")
      assert eventually(fn -> in_flight(llm) == 3 end)
      assert {:error, %Error{reason: :overloaded}} = ask(llm, "reply:x")
    end

    test "goes back where a replica refuses, and loses no request", %{tmp_dir: dir} do
      for replicas <- [1, 2] do
        llm = start!("ready", replicas: replicas, env: %{"VLLM_TEST_A" => "old"})
        callers = load(llm, 4)
        # The first replica takes it, if there are two.
        bad = "once:#{dir}/#{replicas}:print:x;if:#{dir}/#{replicas}:refuse:out_of_memory;ready"
        options = [model: bad, env: %{"VLLM_TEST_A" => "new"}]
        assert {:error, %Error{reason: :out_of_memory}} = VLLM.reload(llm, options)
        assert_nothing_lost(callers)
        assert Enum.all?(states(llm), &(&1 == :ready))
        for _ <- 1..4, do: assert({:ok, "old"} = ask(llm, "env:VLLM_TEST_A"))
      end
    end

    test "puts those before it back as well", %{tmp_dir: dir} do
      llm = start!("ready", replicas: 2, env: %{"VLLM_TEST_A" => "old"})
      # The second to come finds the file of the first.
      bad = "if:#{dir}/first:refuse:out_of_memory;touch:#{dir}/first;ready"
      options = [model: bad, env: %{"VLLM_TEST_A" => "new"}]
      assert {:error, %Error{reason: :out_of_memory}} = VLLM.reload(llm, options)
      assert File.exists?(Path.join(dir, "first"))
      assert states(llm) == [:ready, :ready]
      for _ <- 1..4, do: assert({:ok, "old"} = ask(llm, "env:VLLM_TEST_A"))
      # What is started later has the old ones, too.
      assert :ok = VLLM.scale(llm, 3)
      for _ <- 1..6, do: assert({:ok, "old"} = ask(llm, "env:VLLM_TEST_A"))
    end

    test "goes back where a replica dies or hangs while it loads, without trying again" do
      llm = start!("ready")

      assert {:error, %Error{reason: :engine_dead} = error} =
               VLLM.reload(llm, model: "print:too bad;exit:3")

      assert List.last(error.details["log"]) == "too bad"

      assert {:error, %Error{reason: :load_timeout}} =
               VLLM.reload(llm, model: "hang", load_timeout: 300)

      assert {:ok, "x"} = ask(llm, "reply:x")
      assert_raise Error, fn -> VLLM.reload!(llm, model: "refuse:not_a_model") end
    end

    test "survives the process of the worker, and its program" do
      llm = start!("ready", env: %{"VLLM_TEST_A" => "old"})
      assert :ok = VLLM.reload!(llm, env: %{"VLLM_TEST_A" => "new"})
      assert {:error, %Error{reason: :engine_dead}} = ask(llm, "kill")
      assert {:ok, "new"} = ask(llm, "env:VLLM_TEST_A")
      [{worker, program}] = workers(llm)
      monitor = Process.monitor(worker)
      Process.exit(worker, :kill)
      assert_receive {:DOWN, ^monitor, _, _, _}
      assert eventually(fn -> ask(llm, "env:VLLM_TEST_A") == {:ok, "new"} end)
      refute alive?(program.os_pid)
    end

    test "brings a failed engine back" do
      start_supervised!({VLLM.FakeEngine, name: Mended, model: "refuse:not_a_model"})
      assert {:error, %Error{reason: :not_a_model}} = VLLM.await_ready(Mended)
      assert :ok = VLLM.reload(Mended, model: "ready")
      assert {:ok, "x"} = ask(Mended, "reply:x")
    end

    test "leaves a drained replica at rest, which then starts with them" do
      llm = start!("ready", replicas: 2)
      assert :ok = VLLM.drain(llm, 1)
      assert :ok = VLLM.reload(llm, env: %{"VLLM_TEST_A" => "new"})
      assert states(llm) == [:drained, :ready]
      assert :ok = VLLM.restart(llm, 1)
      assert :ok = VLLM.drain(llm, 2)
      assert {:ok, "new"} = ask(llm, "env:VLLM_TEST_A")
    end

    # An engine of one replica, whose programs do what the test tells them.
    defp start_puppet!(options \\ [shutdown_timeout: 0]) do
      test = self()
      {:ok, config} = VLLM.Engine.Config.new([model: "puppet"] ++ options)
      config = %{config | owner: test, start_program: fn _ -> Puppet.start(test) end}
      {:ok, llm} = VLLM.Engine.start(config)
      puppet = loading()
      Puppet.tell(puppet, {:load, :ok})
      :ok = VLLM.await_ready(llm)
      {llm, puppet}
    end

    defp loading do
      assert_receive {:puppet, puppet, :loading}
      puppet
    end

    defp assert_answers(llm, puppet, prompt) do
      ask_in_background(llm, prompt)
      assert_receive {:puppet, ^puppet, {:asked, ^prompt}}
      Puppet.tell(puppet, {:answer, prompt})
      assert_receive {:answer, {:ok, ^prompt}}
    end

    test "of the only replica has it serve until the new one is ready, and for good if that refuses" do
      {llm, old} = start_puppet!()
      in_background(:reloaded, fn -> VLLM.reload(llm, max_queue: 1) end)
      refused = loading()
      assert_answers(llm, old, "meanwhile")
      assert states(llm) == [:ready]
      Puppet.tell(refused, {:load, "not_a_model"})
      assert_receive {:reloaded, {:error, %Error{reason: :not_a_model}}}
      assert_answers(llm, old, "after")
      assert states(llm) == [:ready]
      assert [_one] = Supervisor.which_children(workers_supervisor(llm))
    end

    test "of the only replica loses nothing, and the new one is the replica then" do
      {llm, first} = start_puppet!()

      # What a reload leaves must do for the next.
      Enum.reduce(1..2, first, fn n, old ->
        ask_in_background(llm, "old")
        assert_receive {:puppet, ^old, {:asked, "old"}}
        in_background(:reloaded, fn -> VLLM.reload(llm, max_queue: n) end)
        new = loading()
        Puppet.tell(new, {:load, :ok})
        assert eventually(fn -> states(llm) == [:draining] end)
        assert_answers(llm, new, "new")
        refute_received {:reloaded, _}
        Puppet.tell(old, {:answer, "old"})
        assert_receive {:answer, {:ok, "old"}}
        assert_receive {:reloaded, :ok}
        assert [%Replica{index: 1, state: :ready}] = VLLM.replicas!(llm)

        # Its process begins anew in the same place.
        [{worker, %{port: ^new}}] = workers(llm)
        Process.exit(worker, :kill)
        again = loading()
        Puppet.tell(again, {:load, :ok})
        assert eventually(fn -> states(llm) == [:ready] end)
        assert_answers(llm, again, "again")
        again
      end)

      assert [_one] = Supervisor.which_children(workers_supervisor(llm))
    end

    test "of the only replica lets the requests of both finish when the engine is stopped" do
      {llm, old} = start_puppet!(shutdown_timeout: 60_000)
      ask_in_background(llm, "old")
      assert_receive {:puppet, ^old, {:asked, "old"}}
      in_background(:reloaded, fn -> VLLM.reload(llm, max_queue: 1) end)
      new = loading()
      Puppet.tell(new, {:load, :ok})
      assert eventually(fn -> states(llm) == [:draining] end)
      ask_in_background(llm, "new")
      assert_receive {:puppet, ^new, {:asked, "new"}}
      in_background(:stopped, fn -> VLLM.stop(llm) end)
      assert_receive {:reloaded, {:error, %Error{reason: :not_running}}}
      refute_received {:answer, _}

      Puppet.tell(old, {:answer, "old"})
      assert_receive {:answer, {:ok, "old"}}
      refute_receive {:answer, _}, 200
      Puppet.tell(new, {:answer, "new"})
      assert_receive {:answer, {:ok, "new"}}
      assert_receive {:stopped, :ok}
    end

    test "of the only replica has it make room where there is none for two" do
      {llm, old} = start_puppet!()
      monitor = Process.monitor(old)
      in_background(:reloaded, fn -> VLLM.reload(llm, max_queue: 1) end)
      Puppet.tell(loading(), {:load, "out_of_memory"})
      new = loading()
      assert_receive {:DOWN, ^monitor, :process, _, _}
      Puppet.tell(new, {:load, :ok})
      assert_receive {:reloaded, :ok}
      assert_answers(llm, new, "x")
    end

    defp workers_supervisor(llm) do
      {:ok, table, _pid} = VLLM.Engine.Table.lookup(llm)
      VLLM.Engine.Table.workers_supervisor(table)
    end

    test "refuses what it cannot change, and what is wrong, and changes nothing" do
      llm = start!("ready", replicas: 2)

      for {options, option} <- [
            {[name: Other], "name"},
            {[replicas: 3], "replicas"},
            {[devices: [[0]]], "devices"},
            {[max_queue: -1], "max_queue"},
            {[model: ""], "model"}
          ] do
        assert {:error, %Error{reason: :invalid_option} = error} = VLLM.reload(llm, options)
        assert error.details["option"] == option
      end

      assert states(llm) == [:ready, :ready]
    end
  end
end
