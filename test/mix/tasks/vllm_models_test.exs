defmodule Mix.Tasks.Vllm.ModelsTest do
  # Mix's shell is the same for all processes, and so is the environment.
  use ExUnit.Case, async: false

  import VLLM.MixShell

  alias Mix.Tasks.Vllm.{Models, Pull}
  alias VLLM.{DemoModel, Hub, HubServer}

  setup :capture_shell

  test "models are a table" do
    model = %Hub.Model{
      id: "org/name",
      size: 4_400_000_000,
      incomplete: 0,
      last_used: ~U[2026-11-27 12:30:00Z],
      revisions: %{"main" => String.duplicate("a", 40)},
      method: "awq",
      path: "/cache"
    }

    commit = String.duplicate("0123abcd", 5)
    other = %{model | id: "m", incomplete: 7, method: nil, revisions: %{commit => commit}}
    Models.print([model, other])
    [title, first, second, total] = for line <- lines(), do: String.split(line, ~r/ {2,}/)
    assert title == ["model", "revision", "method", "size", "last used"]
    assert first == ["org/name", "main", "awq", "4.4 GB", "2026-11-27 12:30"]
    assert second == ["m", "0123abcd", "-", "4.4 GB (incomplete)", "2026-11-27 12:30"]
    assert total == ["2 models, 8.8 GB"]
    Models.print([model])
    assert List.last(lines()) == "1 model, 4.4 GB"
    Models.print([])
    assert lines() == ["There are none yet; `mix vllm.pull MODEL` downloads one."]
  end

  test "what is no option is told before anything is asked" do
    assert_raise Mix.Error, ~r/no --jsn/, fn -> Models.run(["--jsn"]) end
    assert_raise Mix.Error, ~r/no argument "org/, fn -> Models.run(["org/name"]) end
    assert_raise Mix.Error, ~r/Which model/, fn -> Pull.run([]) end
  end

  @tag :tmp_dir
  test "a model is pulled, shown and deleted", %{tmp_dir: folder} do
    server = HubServer.start(folder)
    config = File.read!(Path.join(DemoModel.path("demo-awq"), "config.json"))
    HubServer.put(server, "org/demo@v1", %{"config.json" => config})
    HubServer.put(server, "org/demo", %{"config.json" => config})
    for {name, value} <- HubServer.env(server), do: VLLM.SystemEnv.put_env(name, value)
    Application.put_env(:ex_vllm, :telemetry_listeners, test: self())
    on_exit(fn -> Application.delete_env(:ex_vllm, :telemetry_listeners) end)
    Pull.run(["org/demo", "--revision", "v1"])
    assert [path] = lines()
    named = %{model: "org/demo"}
    assert_received {[:vllm, :pull, :start], %{system_time: _}, ^named}
    assert_received {[:vllm, :pull, :progress], %{bytes: _, files: 1, duration: _}, ^named}
    assert_received {[:vllm, :pull, :stop], %{duration: _}, %{model: "org/demo", path: ^path}}
    assert File.read!(Path.join(path, "config.json")) == config
    Pull.run(["org/demo", "--revision", "v1", "--json"])
    assert lines() == [~s({\n  "path": "#{path}"\n})]
    Models.run(["--json"])
    assert [json] = lines()
    assert json =~ ~s("id": "org/demo") and json =~ ~s("method": "awq") and json =~ ~s("v1": )
    assert catch_exit(Models.run(["--delete", "org/other"])) == {:shutdown, 1}
    assert_received {:mix_shell, :error, [message]}
    assert message =~ "`org/other`"
    Models.run(["--delete", "org/demo"])
    assert [deleted] = lines()
    assert deleted =~ ~r/^org\/demo is deleted, which makes \d.* free/
    refute File.exists?(path)
  end
end
