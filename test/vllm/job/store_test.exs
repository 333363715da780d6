defmodule VLLM.Job.StoreTest do
  use ExUnit.Case, async: false

  import ExUnit.CaptureLog
  import VLLM.FakeJobs

  alias VLLM.{Data, Error}
  alias VLLM.Job.{Lock, Output, Owner, Progress, Record, Source, Store}

  @moduletag :tmp_dir
  setup :folders

  defp record(fields \\ []) do
    struct!(
      %Record{
        id: Record.new_id(),
        kind: :quantize,
        name: "n",
        source: "org/m",
        state: :quantizing,
        owner: Owner.this(),
        options: %{"to" => [["gguf", "Q4"]], "verify" => true},
        made_at: Record.now(),
        outputs: [%Output{label: "Q4", format: "gguf", state: :verifying, files: %{"f" => 3}}],
        progress: %Progress{job: "id", state: :quantizing, done: 1, figures: %{"loss" => 0.5}}
      },
      fields
    )
  end

  test "what is written is read again" do
    error = Error.new(:unsupported, "No.", %{"why" => "so"})
    failed = %Output{label: "Q8", format: "gguf", state: :failed, error: error}
    record = record(outputs: [hd(record().outputs), failed])
    assert Store.write(record) == :ok
    assert Store.read(record.id) == {:ok, record}
    assert Store.list() == [record]

    ended = Record.ended(record, :failed, error)
    assert Store.write(ended) == :ok
    assert Store.read(record.id) == {:ok, ended}
    assert File.ls!(Data.jobs(record.id)) == ["job"]
  end

  test "whoever reads while others write reads a whole record" do
    record = record()
    :ok = Store.write(record)

    writer =
      Task.async(fn ->
        for n <- 1..100, do: Store.write(%{record | options: %{"n" => List.duplicate(n, 2_000)}})
      end)

    for _ <- 1..200, do: assert({:ok, %Record{}} = Store.read(record.id))
    Task.await(writer)
  end

  test "a job whose BEAM is gone is interrupted, and one of a BEAM that runs is not" do
    running = record()
    # The same number, of a process that was started at another time.
    gone = record(owner: %{running.owner | "started" => "1"})
    rebooted = record(owner: %{running.owner | "boot" => "another"})
    for record <- [running, gone, rebooted], do: :ok = Store.write(record)
    assert {:ok, %{state: :quantizing}} = Store.read(running.id)

    for id <- [gone.id, rebooted.id] do
      assert {:ok, %{state: :interrupted, error: %Error{reason: :job_interrupted}}} =
               Store.read(id)

      File.mkdir_p!(Store.tmp(id))
      File.touch!(Path.join(Data.jobs(id), "job.draft"))
    end

    other = %{running.owner | "pid" => "1"}
    assert Store.sweep(other) == :ok
    assert {:ok, ^running} = Store.read(running.id)
    for id <- [gone.id, rebooted.id], do: assert(File.ls!(Data.jobs(id)) == ["job"])

    # This BEAM has begun anew.
    assert Store.sweep(Owner.this()) == :ok
    assert {:ok, %{state: :interrupted}} = Store.read(running.id)
  end

  test "files that cannot be read are set aside, and it is said so" do
    for {bytes, said} <- [
          {"", "damaged"},
          {"\xC1garbage", "damaged"},
          # A record of another job is none of this one.
          {IO.iodata_to_binary(Record.encode(record())), "damaged"},
          {binary_part(IO.iodata_to_binary(Record.encode(record())), 0, 100), "damaged"},
          {VLLM.Bridge.MessagePack.encode!(%{version: 1, id: "x", state: "flying"}), "damaged"},
          {VLLM.Bridge.MessagePack.encode!(%{version: 2}), "newer version"}
        ] do
      id = Record.new_id()
      path = Path.join(Data.jobs(id), "job")
      File.mkdir_p!(Store.tmp(id))
      File.write!(path, bytes)
      log = capture_log(fn -> Store.sweep(Owner.this()) end)
      assert {:error, %Error{reason: :job_not_found}} = Store.read(id)
      assert log =~ id
      assert log =~ said
      assert File.exists?(path) == (said == "newer version")
      File.rm_rf!(Data.jobs(id))
    end

    assert Store.list() == []
  end

  test "no text of a file becomes an atom" do
    name = "state_#{System.unique_integer([:positive])}"
    bytes = IO.iodata_to_binary(Record.encode(record()))

    bytes =
      :binary.replace(
        bytes,
        VLLM.Bridge.MessagePack.encode!("verifying") |> IO.iodata_to_binary(),
        VLLM.Bridge.MessagePack.encode!(name) |> IO.iodata_to_binary()
      )

    assert Record.decode(bytes) == :damaged
    assert_raise ArgumentError, fn -> String.to_existing_atom(name) end
  end

  test "a data folder that cannot be written to is told with what to do" do
    File.write!(Data.dir(), "in the way")
    assert {:error, %Error{reason: :cache_not_writable, message: message}} = Store.write(record())
    assert message =~ "data_dir"
  end

  test "what a job has made gets its place once, where nothing is", %{folder: folder} do
    [ours, theirs] = for name <- ["ours", "theirs"], do: Path.join(folder, name)
    for path <- [ours, theirs], do: File.mkdir_p!(path)
    place = Data.model("n", "Q4")
    refute Store.published?("ours", place)
    assert Store.publish("ours", ours, place) == {:ok, place}
    assert Store.published?("ours", place)
    refute Store.published?("theirs", place)

    # A try that was cut off after that.
    assert Store.publish("ours", ours, place) == {:ok, place}

    assert {:error, %Error{reason: :name_taken} = error} = Store.publish("theirs", theirs, place)
    assert error.details == %{"path" => place}
    assert Store.published?("ours", place)
  end

  test "one at a time has the lock of a folder, which a process that ends gives back",
       %{folder: folder} do
    test = self()

    hold = fn ->
      spawn_link(fn ->
        Lock.exclusively(folder, fn ->
          send(test, {:holds, self()})
          receive do: (:go -> :ok)
        end)

        Process.sleep(:infinity)
      end)
    end

    first = hold.()
    assert_receive {:holds, ^first}
    second = hold.()
    # Another folder is none of its business.
    assert Lock.exclusively(folder <> "/other", fn -> :done end) == :done
    refute_received {:holds, ^second}
    send(first, :go)
    assert_receive {:holds, ^second}, 4_000
    Process.unlink(second)
    Process.exit(second, :kill)
    third = hold.()
    # Sooner than it is done without.
    assert_receive {:holds, ^third}, 4_000
  end

  test "logs are bounded" do
    id = Record.new_id()
    File.mkdir_p!(Data.jobs(id))
    line = String.duplicate("x", 1_000)
    for _ <- 1..40, do: Store.log(id, List.duplicate(line, 100))
    Store.log(id, ["the last"])
    lines = Store.read_log(id)
    assert List.last(lines) == "the last"
    assert length(lines) in 1_000..2_300
  end

  test "a model that changes has another fingerprint", %{model: model} do
    File.write!(Path.join(model, "weights"), String.duplicate("a", 300_000))
    assert {:ok, before} = Source.fingerprint(model)
    assert Source.unchanged(model, before) == :ok

    File.write!(Path.join(model, "config.json"), "[]")
    assert {:error, %Error{reason: :source_changed}} = Source.unchanged(model, before)
    File.write!(Path.join(model, "config.json"), "{}")
    File.write!(Path.join(model, "new"), "")
    assert {:error, %Error{reason: :source_changed}} = Source.unchanged(model, before)
    File.rm_rf!(model)
    assert {:error, %Error{reason: :source_changed}} = Source.unchanged(model, before)
  end
end
