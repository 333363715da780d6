defmodule VLLM.HubTest do
  # Models of a hub on this machine, by the real client. What its answers and faults come to in
  # Python is in python/tests/test_hub_download.py.
  use ExUnit.Case, async: true

  import ExUnit.CaptureIO
  import VLLM.OSProcess, only: [eventually: 2]

  alias VLLM.{DemoModel, Error, Hub, HubServer}

  setup context do
    if folder = context[:tmp_dir] do
      server = HubServer.start(folder)
      HubServer.put(server, "org/demo", demo())
      %{server: server, options: [env: HubServer.env(server)]}
    else
      :ok
    end
  end

  defp demo do
    for name <- File.ls!(DemoModel.path()), into: %{} do
      {name, {:link, Path.join(DemoModel.path(), name)}}
    end
  end

  defp size(folder),
    do: folder |> File.ls!() |> Enum.map(&File.stat!(Path.join(folder, &1)).size) |> Enum.sum()

  @tag :tmp_dir
  test "a model is pulled, listed, found and deleted", %{server: server, options: options} do
    HubServer.put(server, "org/other", %{"config.json" => "{}"}, %{downloads: 7, tags: ["awq"]})

    {{:ok, path}, shown} =
      with_io(fn -> Hub.pull("org/demo", [notify: {self(), :told}, progress: true] ++ options) end)

    assert shown =~ ~r/\r\e\[K\[=+\] 8\.\d of 8\.\d MB \(100 %\), 6 of 6 files.*\n\z/
    assert Enum.sort(File.ls!(path)) == Enum.sort(File.ls!(DemoModel.path()))
    size = size(DemoModel.path())
    assert_received {:told, %Hub.Progress{total_bytes: ^size, total_files: 6}}

    assert {:ok, [%Hub.Model{id: "org/demo", size: ^size, incomplete: 0, path: ^path} = model]} =
             Hub.list(options)

    assert %{"main" => _commit} = model.revisions
    assert DateTime.diff(DateTime.utc_now(), model.last_used) in 0..600
    assert Hub.delete("org/demo", options) == {:ok, size}
    refute File.exists?(path)

    assert {:ok, [%Hub.Found{id: "org/other", downloads: 7, method: "awq", gated?: false}]} =
             Hub.search("oth", options)

    assert {:ok, [%Hub.Found{id: "org/other"}, %Hub.Found{id: "org/demo"}]} =
             Hub.search("", [author: "org"] ++ options)
  end

  @tag :tmp_dir
  test "a download ends with its caller, and the next goes on from there", context do
    %{server: server, options: options} = context
    HubServer.set_faults(server, [%{path: "safetensors", kind: "stall", after: 3_000_000}])
    test = self()
    task = Task.async(fn -> Hub.pull("org/demo", [notify: {test, :told}] ++ options) end)
    assert_receive {:told, %Hub.Progress{bytes: bytes}} when bytes > 3_000_000, 60_000
    assert Task.shutdown(task, :brutal_kill) == nil
    assert eventually(fn -> none_pulls?(server) end, 30_000)
    kept = incomplete(server)
    assert kept >= 3_000_000

    HubServer.set_faults(server, [])
    assert {:ok, path} = Hub.pull("org/demo", options)
    assert size(path) == size(DemoModel.path())
    ranges = Regex.scan(~r/"range": "bytes=(\d+)-\d*"/, HubServer.requests(server))
    assert Enum.any?(ranges, fn [_, from] -> from == Integer.to_string(kept) end)
  end

  # How much there is of the weights, which nobody takes for a model.
  defp incomplete(server) do
    model = Path.join(server.cache, "hub/models--org--demo")
    assert Path.wildcard(Path.join(model, "snapshots/*/config.json")) == []
    parts = Path.wildcard(Path.join(model, "blobs/*.incomplete"))
    parts |> Enum.map(&File.stat!(&1).size) |> Enum.max()
  end

  # Whether no process knows of the hub any more.
  defp none_pulls?(server) do
    not Enum.any?(Path.wildcard("/proc/[0-9]*/environ"), fn path ->
      case File.read(path) do
        {:ok, environment} -> environment =~ "HF_ENDPOINT=#{server.endpoint}\0"
        {:error, _ended} -> false
      end
    end)
  end

  @tag :tmp_dir
  test "what keeps a model from coming is told, and no token", %{options: options} do
    assert {:error, %Error{reason: :hub_unauthorized} = error} =
             Hub.pull("org/demo", [hf_token: "bad_secret"] ++ options)

    refute inspect(error) =~ "bad_secret"
  end

  test "a download of which nothing comes ends in its time" do
    # It knows no `pull`, and does not answer.
    silent = [python: Path.expand("../support/fake_python", __DIR__)]

    assert {:error, %Error{reason: :timeout} = error} =
             Hub.pull("a/b", [stall_timeout: 50] ++ silent)

    assert error.details["option"] == "stall_timeout"

    assert {:error, %Error{reason: :timeout} = error} = Hub.pull("a/b", [timeout: 50] ++ silent)

    assert error.details["option"] == "timeout"
  end

  test "what cannot be is refused without Python" do
    for options <- [[notify: :nobody], [stall_timeout: 0], [progress: 1], [timeout: -1]] do
      [{name, _value}] = options
      option = Atom.to_string(name)

      assert {:error, %Error{reason: :invalid_option, details: %{"option" => ^option}}} =
               Hub.pull("org/demo", options ++ [python: "/no/python"])
    end

    assert {:error, %Error{reason: :invalid_option}} = Hub.delete(:model, python: "/no/python")
    assert {:error, %Error{reason: :invalid_option}} = Hub.search("x", limt: 3)
    assert_raise Error, ~r/limit/, fn -> Hub.search!("x", limt: 3) end
  end
end
