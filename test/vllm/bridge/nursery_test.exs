defmodule VLLM.Bridge.NurseryTest do
  # The library's supervisor of nurseries, and the environment, are the BEAM's own.
  use ExUnit.Case, async: false

  import ExUnit.CaptureLog

  alias VLLM.Bridge.Nursery
  alias VLLM.FakeInterpreter

  @moduletag :tmp_dir

  defp nurseries do
    for {_, pid, _, _} <- DynamicSupervisor.which_children(VLLM.NurserySupervisor), do: pid
  end

  # The nursery of a process that has one for as long as it is asked to.
  defp use_nursery(python) do
    before = nurseries()
    test = self()

    user =
      spawn_link(fn ->
        send(test, {:mode, Nursery.mode(python, %{})})
        receive do: (:done -> :ok)
      end)

    assert_receive {:mode, ["--nursery", _socket]}, 30_000
    [nursery] = nurseries() -- before
    on_exit(fn -> DynamicSupervisor.terminate_child(VLLM.NurserySupervisor, nursery) end)
    {user, nursery}
  end

  test "what a Python lacks is said by the worker alone", %{tmp_dir: folder} do
    log =
      capture_log(fn ->
        assert {:error, %VLLM.Error{reason: :vllm_not_installed}} =
                 VLLM.llm("model", python: FakeInterpreter.with_worker!(folder, "exit 78"))
      end)

    refute log =~ "forked from"

    assert capture_log(fn ->
             VLLM.llm("model",
               python: FakeInterpreter.with_worker!(folder, "exit 3"),
               max_restarts: 0
             )
           end) =~ "forked from ended with status 3"
  end

  test "an interpreter that is not there is the worker's error alone", %{tmp_dir: folder} do
    log = capture_log(fn -> assert [] = Nursery.mode(Path.join(folder, "none"), %{}) end)
    assert log == ""
  end

  test "those that nobody uses end when the environment has changed", %{tmp_dir: folder} do
    python = FakeInterpreter.with_worker!(folder, "exec sleep 600")
    {user, unused} = use_nursery(python)
    {_user, used} = use_nursery(FakeInterpreter.with_worker!(folder <> "/..", "exec sleep 600"))
    monitor = Process.monitor(unused)
    send(user, :done)
    assert VLLM.OSProcess.eventually(fn -> :sys.get_state(unused).timer end)
    VLLM.SystemEnv.put_env("VLLM_TEST_NURSERY", "changed")
    {_user, _next} = use_nursery(python)
    assert_receive {:DOWN, ^monitor, :process, _, :normal}, 30_000
    assert used in nurseries()
  end
end
