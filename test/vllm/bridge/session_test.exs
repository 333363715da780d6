defmodule VLLM.Bridge.SessionTest do
  use ExUnit.Case, async: true

  import VLLM.OSProcess

  alias VLLM.Bridge.{MessagePack, Session}
  alias VLLM.Error

  # It speaks as the worker of an engine does, and `load` has it do what the model's name says.
  @python Path.expand("../../support/fake_python", __DIR__)

  defp open!(opts \\ []) do
    {:ok, session} = Session.open(:engine, [python: @python] ++ opts)
    session
  end

  defp load(session, model, timeout \\ 60_000) do
    Session.call(session, "load", %{"model" => model}, timeout)
  end

  # The guard, and the folder of its run.
  defp program(session), do: :sys.get_state(session.pid).program

  defp gone?(program) do
    eventually(fn -> not alive?(program.os_pid) and not File.exists?(program.run_dir) end, 30_000)
  end

  test "a worker is greeted, asked and ended" do
    session = open!()
    assert %{"protocol" => 2} = session.hello
    program = program(session)
    assert {:ok, %{"model" => _}} = load(session, "ready")
    assert Session.close(session) == :ok
    assert not alive?(program.os_pid) and not File.exists?(program.run_dir)
  end

  test "a session is given to a function, and ends with it" do
    assert {:raised, program} =
             (try do
                Session.run(:engine, [python: @python], &throw({:raised, program(&1)}))
              catch
                thrown -> thrown
              end)

    assert gone?(program)
  end

  test "several processes may ask at once" do
    session = open!()
    tasks = for _ <- 1..20, do: Task.async(fn -> Session.call(session, "hello", %{}, 60_000) end)
    answers = Task.await_many(tasks, 60_000)
    assert Enum.all?(answers, &match?({:ok, %{"protocol" => 2}}, &1))
    Session.close(session)
  end

  test "a refusal is an error, and the session goes on" do
    session = open!()
    assert {:error, %Error{reason: :model_not_found}} = load(session, "refuse:model_not_found")
    assert {:ok, _} = Session.call(session, "hello", %{}, 60_000)
    Session.close(session)
  end

  test "the worker ends with the process that opened it" do
    test = self()

    {pid, monitor} =
      spawn_monitor(fn ->
        session = open!()
        send(test, {:program, program(session)})
        Process.sleep(:infinity)
      end)

    assert_receive {:program, program}, 60_000
    Process.exit(pid, :kill)
    assert_receive {:DOWN, ^monitor, :process, _, _}
    assert gone?(program)
  end

  test "a worker that dies is the error of what it was asked, and of all that follows" do
    session = open!()
    program = program(session)
    assert {:error, %Error{reason: :engine_dead} = error} = load(session, "print:Farewell;exit:3")
    assert error.message =~ "ended with status 3"
    assert "Farewell" in error.details["log"]
    assert load(session, "ready") == {:error, error}
    assert gone?(program)
    Session.close(session)
  end

  test "a worker that breaks the protocol is ended" do
    session = open!()
    program = program(session)
    assert {:error, %Error{reason: reason}} = load(session, "garbage")
    assert reason in [:protocol, :engine_dead]
    assert gone?(program)
    Session.close(session)
  end

  test "a request that takes too long is an error that names it, and the session goes on" do
    session = open!()
    assert {:error, %Error{reason: :timeout, message: message}} = load(session, "sleep:1", 50)
    assert message =~ "`load` within 0.05 seconds"
    assert {:ok, _} = Session.call(session, "hello", %{}, 60_000)
    Session.close(session)
  end

  describe "a request that is followed" do
    defp follow(session, model, patience) do
      test = self()
      params = %{"model" => model}
      Session.follow(session, "load", params, :infinity, patience, &send(test, {:heard, &1}))
    end

    # The step by which the fake worker says how far it is.
    defp progress(bytes) do
      note = encode([2, "progress", %{"id" => "the request", "bytes" => bytes}])
      "frame:" <> String.replace(note, encode("the request"), "ID")
    end

    defp encode(term) do
      term |> MessagePack.encode!() |> IO.iodata_to_binary() |> Base.encode16(case: :lower)
    end

    test "tells how far it is, and then its answer" do
      session = open!()
      steps = [progress(1), progress(2), "frame:" <> "9302a870726f677265737380", "ready"]
      assert {:ok, %{"model" => _}} = follow(session, Enum.join(steps, ";"), 60_000)
      assert_received {:heard, %{"bytes" => 1}}
      assert_received {:heard, %{"bytes" => 2}}
      refute_received _
      Session.close(session)
    end

    test "ends where nothing is heard for too long" do
      session = open!()
      assert {:error, %Error{reason: :timeout}} = follow(session, progress(1) <> ";hang", 100)
      assert_received {:heard, %{"bytes" => 1}}
      # Nobody follows this one.
      assert {:ok, _} = Session.call(session, "hello", %{}, 60_000)
      assert {:ok, _} = load(session, progress(3) <> ";ready")
      refute_received _
      Session.close(session)
    end
  end

  @tag :tmp_dir
  test "a Python without the packages says so, however soon it ends", %{tmp_dir: folder} do
    line = ~s(echo "No module named 'msgspec'"; exit 78)
    python = VLLM.FakeInterpreter.with_worker!(folder, line)
    assert {:error, %Error{} = error} = Session.open(:tools, python: python)
    assert error.reason == :vllm_not_installed
    assert error.details["log"] == ["No module named 'msgspec'"]

    assert {:error, %Error{reason: :python_not_found}} =
             Session.open(:tools, python: "/no/python")
  end

  test "what a worker prints is handed on, also where it is killed" do
    test = self()
    session = open!(on_log: &send(test, {:printed, &1}))
    assert {:ok, _} = load(session, "print:one;print:two;ready")
    program = program(session)

    # The guard writes it, beside the answers of the worker; what it has not read is lost with both.
    log = Path.join(program.run_dir, "log")
    assert eventually(fn -> File.exists?(log) and File.read!(log) =~ "two\n" end)
    assert Session.kill(session) == :ok
    assert not alive?(program.os_pid) and not File.exists?(program.run_dir)
    assert printed() == ["one", "two"]
    assert Session.kill(session) == :ok
  end

  defp printed do
    receive do
      {:printed, lines} -> lines ++ printed()
    after
      0 -> []
    end
  end

  test "workers know the data folder" do
    session = open!()
    params = %{"prompt" => "env:EX_VLLM_DATA"}

    assert {:ok, %{"outputs" => [%{"text" => folder}]}} =
             Session.call(session, "generate", params, 60_000)

    assert folder == VLLM.Data.dir()
    Session.close(session)
  end

  test "workers know which Python quantizes, where there is one" do
    session = open!()
    params = %{"prompt" => "env:EX_VLLM_QUANTIZE_PYTHON"}

    assert {:ok, %{"outputs" => [%{"text" => python}]}} =
             Session.call(session, "generate", params, 60_000)

    case VLLM.Python.executable(:quantize) do
      {:ok, path} -> assert python == path
      {:error, _} -> assert python in [nil, ""]
    end

    Session.close(session)
  end

  test "the worker of a job stands back behind others" do
    {:ok, session} = Session.open(:job, env: %{"EX_VLLM_NICE" => "7"})
    worker = session.hello["pid"]
    assert worker |> stat() |> Enum.at(16) == "7"
    assert File.read!("/proc/#{worker}/oom_score_adj") == "500\n"
    Session.close(session)
  end

  # What comes after the name, which may hold anything: from the state on.
  defp stat(pid),
    do: File.read!("/proc/#{pid}/stat") |> String.split(") ") |> List.last() |> String.split(" ")

  test "tools tell of packages" do
    names = ["msgspec", "no-such-package"]

    assert {:ok, %{"msgspec" => _} = versions} =
             Session.run(:tools, &Session.call(&1, "packages", %{"names" => names}, 60_000))

    assert Map.keys(versions) == ["msgspec"]
  end
end
