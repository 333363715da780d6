defmodule Mix.Tasks.Vllm.ModelsTest do
  # Mix's shell is the same for all processes, and so is the environment.
  use ExUnit.Case, async: false

  import VLLM.MixShell

  alias Mix.Tasks.Vllm.{Models, Pull}
  alias VLLM.{DemoModel, HubServer}
  alias VLLM.Models.Model

  setup :capture_shell

  test "models are a table" do
    model = %Model{
      name: "org/name",
      origin: :hub,
      kind: :model,
      aliases: [],
      missing?: false,
      size: 4_400_000_000,
      incomplete: 0,
      last_used: ~U[2026-11-27 12:30:00Z],
      revisions: %{"main" => String.duplicate("a", 40)},
      method: "awq",
      bits: 4,
      path: "/cache"
    }

    commit = String.duplicate("0123abcd", 5)

    other = %{
      model
      | name: "m",
        incomplete: 7,
        method: nil,
        bits: nil,
        revisions: %{commit => commit}
    }

    made = %{
      model
      | name: "llama:Q4_K_M",
        origin: :made,
        aliases: ["prod"],
        bits: 4.85,
        source: "org/llama",
        quality: %{"kl_mean" => 0.01234}
    }

    adapter = %{model | name: "sql", origin: :local, kind: :adapter, bits: nil, last_used: nil}
    gone = %{adapter | missing?: true}
    Models.print([model, other, made, adapter, gone])
    [title | rows] = for line <- lines(), do: String.split(line, ~r/ {2,}/)
    assert title == ["model", "method", "bits", "size", "KL", "last used", "from"]
    time = "2026-11-27 12:30"

    assert rows == [
             ["org/name", "awq", "4", "4.4 GB", "-", time, "the hub: main"],
             ["m", "-", "-", "4.4 GB (incomplete)", "-", time, "the hub: 0123abcd"],
             [
               "llama:Q4_K_M = prod",
               "awq",
               "4.85",
               "4.4 GB",
               "0.0123",
               time,
               "made of org/llama"
             ],
             ["sql", "adapter", "-", "4.4 GB", "-", "-", "/cache"],
             ["sql", "adapter", "-", "4.4 GB", "-", "-", "/cache, which is gone"],
             ["5 models, 22.0 GB"]
           ]

    Models.print([model])
    assert List.last(lines()) == "1 model, 4.4 GB"
    Models.print([])
    assert [line] = lines()
    assert line =~ "`mix vllm.pull MODEL` downloads one"
  end

  test "what is no option is told before anything is asked" do
    assert_raise Mix.Error, ~r/no --jsn/, fn -> Models.run(["--jsn"]) end

    assert_raise Mix.Error, ~r/no --label with --delete/, fn ->
      Models.run(["--delete", "m", "--label", "x"])
    end

    assert_raise Mix.Error, ~r/no --as without another switch/, fn ->
      Models.run(["--as", "m"])
    end

    assert_raise Mix.Error, ~r/--alias m --as NAME/, fn -> Models.run(["--alias", "m"]) end

    assert_raise Mix.Error, ~r/--push m --to OWNER/, fn -> Models.run(["--push", "m"]) end

    assert_raise Mix.Error, ~r/one of --alias and --delete/, fn ->
      Models.run(["--alias", "m", "--delete", "m"])
    end

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
    assert json =~ ~s("name": "org/demo") and json =~ ~s("method": "awq") and json =~ ~s("v1": )
    assert catch_exit(Models.run(["--delete", "org/other"])) == {:shutdown, 1}
    assert_received {:mix_shell, :error, [message]}
    assert message =~ "`org/other`"
    Models.run(["--delete", "org/demo"])
    assert [deleted] = lines()
    assert deleted =~ ~r/^org\/demo is deleted, which makes \d.* free/
    refute File.exists?(path)
  end

  @tag :tmp_dir
  test "a folder gets a name, another one, and loses both", %{tmp_dir: folder} do
    Application.put_env(:ex_vllm, :data_dir, folder)
    on_exit(fn -> VLLM.TestData.use() end)
    VLLM.SystemEnv.put_env("HF_HOME", folder)
    path = DemoModel.path("demo-awq")
    Models.run(["--register", path, "--as", "demo", "--label", "awq"])
    assert lines() == ["#{path} is called demo:awq."]
    Models.run(["--alias", "demo", "--as", "prod"])
    assert lines() == ["prod is another name of demo."]
    Models.run([])
    assert [_titles, row, "1 model, " <> _size] = lines()
    assert row =~ ~r/^demo:awq = prod +awq +4 .* #{Regex.escape(path)}$/
    Models.run(["--delete", "demo"])
    assert lines() == ["demo is deleted, which makes 0 B free."]
  end
end
